"""The page of `monobath serve` as a Hugging Face Space."""

from monobath import Tokenizer
from monobath.app.page import LOCKED, LOOK, build_page
from monobath.app.service import Limits, Service, packaged_names

service = Service({name: Tokenizer.from_pretrained(name) for name in packaged_names()}, Limits())
build_page(service).launch(**LOOK, **LOCKED)
