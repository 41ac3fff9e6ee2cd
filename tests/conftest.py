import pytest
from nursery import nursery


@pytest.fixture(scope="session")
def born():
    """Starts train.py without the seconds that its imports take."""
    with nursery() as born:
        yield born
