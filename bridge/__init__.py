"""From a cycle's result to a block: certificates, lottery, block building, nodes, coordinator and command line."""
