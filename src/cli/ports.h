/* The ports that a checkpoint's processes had, when their connections outlive them. */
#pragma once

/* End the connections in TIME_WAIT that have a local address and port of the checkpoint in `dirfd` (its image directory): a program that was killed a moment ago
 * leaves them for a minute, and CRIU cannot bind them again meanwhile. Nothing else is touched, and nothing at all for a checkpoint that brings its own network
 * along. What cannot be done is not: CRIU says then what it lacks. */
void cli_free_ports(int dirfd);
