"""Resumable batch runs: decode, explain, shards, executors."""
