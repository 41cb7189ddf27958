"""The typed configuration of a run: schema, loading, checking. Importing it loads neither torch nor vllm nor ray."""
