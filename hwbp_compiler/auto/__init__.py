"""``iterations="auto"``: the gradient is compared with the exact one while the model trains, and k and S follow.

``source``    keeps Dynamo's graph, so that further forms of it can be compiled later
``ladder``    the forms that are expected to be faster than exact backprop, cheapest first
``merge``     one joint graph added to another, what both compute once
``check``     one step with the exact gradient and that of every form, compared
``policy``    which form the next step takes; no tensors
``variants``  the callable that Dynamo gets: it holds the forms and asks the policy
"""
