"""Code tasks of lm-evaluation-harness whose programs run in the sandbox of the rewards.

Prompts, stops and examples are the harness' own (lm-eval 0.4.13, MIT licence). Its tasks execute
programs of a model in the process itself; these give them to `rlvr.rewards.sandbox`.
"""
