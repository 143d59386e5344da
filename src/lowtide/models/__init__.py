"""The networks: state-dict names are the published checkpoints' own; no tiers and no devices in here."""
