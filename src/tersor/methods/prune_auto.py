def removed_by_sensitivity(*a, **k): raise NotImplementedError
