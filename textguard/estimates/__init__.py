"""What the records of a campaign say, with intervals. It needs no torch, so that the report can read it without one."""
