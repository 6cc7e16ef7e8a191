"""Many users on one machine: research, benchmarks and audits. Never shipped to a device."""
