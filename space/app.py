"""The page of `monobath serve` as a Hugging Face Space."""

from monobath import Tokenizer
from monobath.app.page import LOCKED, LOOK, build_page
from monobath.app.service import Limits, Service, names_and_sources

models = {name: Tokenizer.from_pretrained(where) for name, where in names_and_sources(None).items()}
build_page(Service(models, Limits())).launch(**LOOK, **LOCKED)
