import pytest

from services.admission import Admission
from services.protocol.errors import Overloaded


def test_admission_refuses_beyond_the_bound_and_frees_what_ends() -> None:
    admission = Admission(10)
    with admission.admit(6):
        with admission.admit(4), pytest.raises(Overloaded) as caught, admission.admit(1):
            pass
        assert caught.value.retry_after == 1
        with admission.admit(4):
            pass
    with pytest.raises(KeyError), admission.admit(10):
        raise KeyError
    with admission.admit(10):
        pass


def test_an_idle_service_admits_a_request_of_any_size() -> None:
    admission = Admission(10)
    with admission.admit(1000), pytest.raises(Overloaded), admission.admit(1):
        pass
