"""What the passes share: operator rules, the linear view of a joint graph, and the data model of chains."""
