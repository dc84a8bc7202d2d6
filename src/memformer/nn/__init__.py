"""The parts of a network: attention, positions, blocks, the memory's writers. They know no configuration."""
