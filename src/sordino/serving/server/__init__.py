"""The server of published prompts, `sordino serve`: who asks, what is read of an upload, and how it is answered.

- `settings.py` has every limit; `keys.py` the API's keys, and what each may ask.
- `guard.py` stands before everything: sizes, time, headers, errors in one line, the log.
- `uploads.py` reads pictures from strangers, `batching.py` answers to many at once, `shelf.py` holds prompts.
- `web.py` has the pages, whose files are in `assets`, with `samples.py` and `compared.py`.
- `app.py` and `inference.py` are the addresses; `listen.py` binds them to a port.
"""
