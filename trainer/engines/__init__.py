"""Engines, which have tasks done: in processes on this machine (`local`), or by miners on others (`nats`)."""
