"""The HTTP service and the web page (extra `serve`), and the same application under Ray Serve (extra `ray`).

From bytes to pixels: `api` (routes and limits) → `protocol` (bytes ↔ tensors) → `service` (requests of one
shape together, one thread of arithmetic). `door` lets nobody in without the token, `page` is for people, `server` runs
it all in one process.
"""
