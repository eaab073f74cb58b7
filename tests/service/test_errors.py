"""The table of errors is complete: each leaf of the trees that a request can end with has a status and a code."""

from service.errors import HTTP_ERRORS, ServiceError
from service.model.errors import ImageError


def leaves(kind: type[Exception]) -> set[type[Exception]]:
    children = kind.__subclasses__()
    return {leaf for child in children for leaf in leaves(child)} if children else {kind}


def test_every_error_has_a_status_and_a_code_of_its_own() -> None:
    assert set(HTTP_ERRORS) == leaves(ServiceError) | leaves(ImageError)
    codes = [code for _, code in HTTP_ERRORS.values()]
    assert len(set(codes)) == len(codes)
