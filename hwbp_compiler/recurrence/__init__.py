"""``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``: how they stay whole, and their backward pass in Highway-BP form.

| file | contents |
|---|---|
| ``tracing`` | Dynamo traces each module as one call, for our backend only |
| ``packed`` | packed sequences, at which Dynamo breaks the graph |
| ``module_call`` | such a call in one form |
| ``operator_call`` | the same call as the operator's kernels receive it |
| ``operator`` | ``highway::recurrent_module``, which replaces the call, and ``highway::recurrent_module_backward`` |
| ``kept`` | a forward pass's recording, tied to the life of a tensor |
| ``dropout`` | the random factors between layers |
| ``layer``, ``gru``, ``lstm`` | Highway-BP of one layer in plain operators |
| ``runs``, ``cpu_runs`` | steps inside segments, all segments at once; with one segment it is exact backprop |
| ``rnn`` | exact backprop of an RNN, which has no highway |
| ``cpu``, ``kernels`` | the forward pass of a GRU on a CPU; how the C++ is built |

The passes ``replace_recurrent_modules`` and ``rewrite_recurrent_modules`` use them.
"""
