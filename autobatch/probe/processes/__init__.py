"""The processes in which trials run: a server that imports, its workers, forks of the present process, and ranks."""
