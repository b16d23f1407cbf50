"""Fine-tuning on masked images, so that more of them can be certified.

Begin with ``loop.py``, the loop in plain sight. ``strategies.py`` is the table of the masking strategies, and
``hiding.py`` what each of them hides; ``train.py`` checks the premises and opens the folder of a run.
"""
