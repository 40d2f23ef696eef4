"""The run-time check of annotations in tests: shapes by jaxtyping, and an int is a float."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
