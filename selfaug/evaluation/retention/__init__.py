"""Retention: what general benchmarks say of the tuned model against the base model, on the same items.

benchmarks.py  which benchmarks there are, and where their items come from
lm.py          our model as lm-eval sees it: fast log-likelihoods and answers
harness.py     one benchmark through lm-eval's task code
store.py       finished benchmarks on disk, so that a killed evaluation goes on
compare.py     base against tuned, item by item, with intervals
style.py       length, one-line answers, refusals and repetition of free answers
suite.py       all of it, in order
"""
