"""The history of the tables: one script for each revision, run by `controller.store.migrate`."""
