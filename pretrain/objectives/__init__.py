"""What is learned: each objective is one file and returns a loss sum.

One more is a file here with a class that answers contract.py's Objective, its arguments in plain values. It brings its
own heads, draws and views; self-distillation also a `Teacher` of backbone and head, which the engine keeps at the
average of the weights (ZeRO stages 0 to 2, with optim.ema_decay). It is then named in

- config/objective.py: `name`, and its own keys, with defaults; config/schema.py: what of the recipe does not go with it
- assemble.py: build_objective, where the keys become arguments
- cost.py: the FLOPs and parameters of what it has beside the backbone
- keyed_random.py: a purpose for each thing that it draws
- README.md: its name, and whether its losses depend on how a batch is cut

and in tests/engine/objective_worker.py, which trains every objective over ranks. Such a file, with two global and two
local views and a teacher, is tests/objectives/self_distillation.py.
"""
