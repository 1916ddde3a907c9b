"""``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``: how they stay whole, and their backward pass in Highway-BP form.

| file | what |
|---|---|
| ``tracing`` | Dynamo traces the modules as one call each, for our backend alone |
| ``packed`` | packed sequences, at which Dynamo breaks the graph |
| ``arguments`` | such a call in one form |
| ``operator`` | ``highway::recurrent``, which takes the call's place, and ``highway::recurrent_backward`` |
| ``kept`` | a forward pass's recording, tied to the life of a tensor |
| ``dropout`` | the random factors between layers |
| ``layer``, ``gru``, ``lstm`` | Highway-BP of one layer in plain operators |
| ``through_time``, ``rnn`` | exact backprop on a CPU: only the step from state to state is sequential |

The passes that put them to use are ``replace_recurrent_modules`` and ``rewrite_recurrent_modules``.
"""
