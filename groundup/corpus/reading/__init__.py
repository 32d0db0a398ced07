"""Files, archives and pages to records: every format in, normalized texts out, with everything unreadable named."""
