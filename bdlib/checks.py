"""One way to refuse a setting: the error names the field, its value and what is allowed."""

from collections.abc import Mapping


def require(settings: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Check the fields of a dataclass.

    Args:
        settings: the dataclass.
        checks: field name -> (whether its value is fine, what is allowed in words).

    Raises:
        ValueError: the first field that is not fine, with its value.
    """
    for name, (fine, allowed) in checks.items():
        if not fine:
            raise ValueError(f"{name} must be {allowed}, got {getattr(settings, name)!r}")
