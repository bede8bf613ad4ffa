"""Linear layers that transformers' modules call with the same rows, by their names."""

# In the order of the calls.
SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
