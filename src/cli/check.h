/* Lines of `bennu check`. */
#pragma once

#include "cli/cli.h"

enum check_level { CHECK_OK, CHECK_WARN, CHECK_FAIL };

/* Add a line: what was looked at, what was found, and what to do about it (empty where all is well). Ends the program when
 * there is no memory. */
void check_add(enum check_level level, const char *name, const char *todo, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

void check_kernel(void);    /* check.c */
void check_criu(void);      /* check_criu.c: CRIU, its own check, plugins */
void check_gpu(void);       /* check_gpu.c: driver, agent, MPS, daemon */
void check_container(void); /* check_container.c: the hook that gives containers the agent */
