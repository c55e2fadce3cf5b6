"""The result: entries and maps, their files and tables; `figures` draws it."""
