"""The textbook forms, a few lines of plain tensor code each: what the tests compare with and the manual prints.

One file a subject, named as its counterpart in the rooms; nothing here imports a room. `transformer.py` puts the
forms of the model's parts together into a whole one.
"""
