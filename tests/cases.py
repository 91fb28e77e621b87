"""Names of parametrized cases."""


def case_id(each: object) -> str | None:
    """Of one argument: the same in every process, as a function's address in memory is not."""
    return None if callable(each) else str(each)[:50]
