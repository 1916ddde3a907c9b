"""``iterations="auto"``: compare the gradient with the exact one while the model trains, and choose k and S from that.

``source``    keeps Dynamo's graph, so that more forms of it can be compiled later
``ladder``    the forms that are expected to be faster than exact backprop, cheapest first
``merge``     adds one joint graph to another and computes what both share only once
``check``     one step with the exact gradient and that of every form, compared
``policy``    which form the next step takes; no tensors
``variants``  the callable that Dynamo gets: it holds the forms and asks the policy
"""
