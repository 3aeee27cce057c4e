/* The program of app.c as a child of the test. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cu.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

struct child {
    pid_t pid;
    FILE *to, *from;
    char answer[256];
};

/* Reads the next answer; fails the test unless it begins with "ok". */
static inline void child_read(struct child *c)
{
    if (!fgets(c->answer, sizeof(c->answer), c->from))
        fail_msg("the program ended");
    if (strncmp(c->answer, "ok", 2) != 0)
        fail_msg("the program answers: %s", c->answer);
}

static inline void child_send(struct child *c, const char *command)
{
    fprintf(c->to, "%s\n", command);
    fflush(c->to);
}

static inline void child_do(struct child *c, const char *command)
{
    child_send(c, command);
    child_read(c);
}

/* limit: of descriptors, NULL for none of our own. */
static inline void child_start(struct child *c, const char *limit)
{
    int to[2], from[2];
    assert_int_equal(pipe2(to, O_CLOEXEC), 0);
    assert_int_equal(pipe2(from, O_CLOEXEC), 0);
    fflush(stdout);
    c->pid = fork();
    if (c->pid == 0) {
        dup2(to[0], 0);
        dup2(from[1], 1);
        char *args[] = {"app", (char *)limit, NULL};
        execv(need_env("BENNU_TEST_APP"), args);
        _exit(127);
    }
    close(to[0]);
    close(from[1]);
    c->to = fdopen(to[1], "we");
    c->from = fdopen(from[0], "re");
    child_read(c);
}

/* A child whose driver can be told what to answer, in a file at `path`, a template (say_failure). */
static inline void child_start_failing(struct child *c, char *path)
{
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    setenv("BENNU_SIM_FAIL_FILE", path, 1);
    child_start(c, NULL);
    unsetenv("BENNU_SIM_FAIL_FILE");
}

/* The handle of a block, as a command that opens it and compares it with block `i`. */
static inline void child_open_command(struct child *owner, int i, char out[256])
{
    char get[32];
    snprintf(get, sizeof(get), "ipcget %d", i);
    child_do(owner, get);
    snprintf(out, 256, "ipcopen %.128s %d 1", owner->answer + 3, i);
}

static inline void child_end(struct child *c)
{
    int status;
    child_send(c, "quit");
    fclose(c->to);
    assert_int_equal(waitpid(c->pid, &status, 0), c->pid);
    assert_int_equal(status, 0);
    fclose(c->from);
}
