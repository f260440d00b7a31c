"""Scheduling without torch: requests, sequence state, KV blocks, prefix cache, scheduler."""
