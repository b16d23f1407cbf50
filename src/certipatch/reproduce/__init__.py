"""The paper's tables as recipes, the runs that follow from them, and doing them."""
