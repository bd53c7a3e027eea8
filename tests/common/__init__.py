"""What the scripts share: data, environments, runs, agents on several devices."""
