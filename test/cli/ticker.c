/* Counts the lines that it reads and answers each with the count; ends with status 42 at the end of its input. Tells signal
 * SIGUSR1 as a line, too. What it counts lives in its memory alone: a restored one goes on where it was. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void on_signal(int sig)
{
    static const char text[] = "signal\n";
    if (write(STDOUT_FILENO, text, sizeof(text) - 1) < 0)
        _exit(1);
}

int main(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    unsigned long count = 0;
    for (;;) {
        char c;
        ssize_t n = read(STDIN_FILENO, &c, 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return 42;
        if (c != '\n')
            continue;
        dprintf(STDOUT_FILENO, "%lu\n", ++count);
    }
}
