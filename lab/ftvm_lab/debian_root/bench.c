/*
 * The benchmark's work inside the guest. It measures nothing: a guest's clock stands still while the guest does, so
 * whoever asks measures by its own.
 *
 * Port 7010 echoes: what comes in goes out, any number of connections, one thread.
 * Port 7011 takes one line a connection, and answers one line when the work is done; a process each:
 *   start UNIT      starts a service
 *   spin ROUNDS     so many rounds of arithmetic
 *   dirty PAGES N   writes to PAGES pages in turn, N pages in all; without pause
 *   dirty PAGES N R the same, at R pages a second by the guest's clock
 *   send BYTES      so many bytes, and no line
 *   take BYTES      reads so many bytes first
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ECHO_PORT = 7010, WORK_PORT = 7011, PAGE = 4096, CHUNK = 1 << 16, EVENTS = 64 };

static char buffer[CHUNK];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int listening(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, end = socket(AF_INET, SOCK_STREAM, 0);

    setsockopt(end, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(end, (struct sockaddr *)&address, sizeof address) < 0 || listen(end, 256) < 0)
        fail("listen");
    return end;
}

static int put(int end, const char *from, size_t left)
{
    while (left) {
        ssize_t sent = write(end, from, left);

        if (sent <= 0)
            return -1;
        from += sent;
        left -= sent;
    }
    return 0;
}

static void add(int poll, int end)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = end};

    if (epoll_ctl(poll, EPOLL_CTL_ADD, end, &event) < 0)
        fail("epoll_ctl");
}

static void echo(void)
{
    int poll = epoll_create1(0), door = listening(ECHO_PORT), one = 1;
    struct epoll_event events[EVENTS];

    add(poll, door);
    for (;;) {
        int found = epoll_wait(poll, events, EVENTS, -1);

        for (int i = 0; i < found; i++) {
            int end = events[i].data.fd;

            if (end == door) {
                end = accept(door, NULL, NULL);
                if (end >= 0) {
                    setsockopt(end, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    add(poll, end);
                }
                continue;
            }
            ssize_t got = read(end, buffer, sizeof buffer);

            /* Nobody has so much under way that this would block: a connection has one message at a time. */
            if (got <= 0 || put(end, buffer, got) < 0)
                close(end);
        }
    }
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static uint64_t spin(uint64_t rounds)
{
    uint64_t word = 88172645463325252ULL;

    while (rounds--) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
    }
    return word;
}

static void dirty(uint64_t pages, uint64_t count, double rate)
{
    char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double start = now();

    if (memory == MAP_FAILED)
        fail("mmap");
    for (uint64_t done = 0; done < count; done++) {
        if (rate > 0) {
            double ahead = done / rate - (now() - start);

            if (ahead > 0.001) {
                struct timespec pause = {(time_t)ahead, (ahead - (time_t)ahead) * 1e9};

                nanosleep(&pause, NULL);
            }
        }
        /* A word a page is enough to make it dirty, and no page is left as it was. */
        *(uint64_t *)(memory + done % pages * PAGE) = done + 1;
    }
    munmap(memory, pages * PAGE);
}

static void transfer(int end, uint64_t left, int sends)
{
    while (left) {
        size_t most = left < CHUNK ? left : CHUNK;
        ssize_t moved = sends ? (put(end, buffer, most) < 0 ? -1 : (ssize_t)most) : read(end, buffer, most);

        if (moved <= 0)
            exit(1);
        left -= moved;
    }
}

static void work(int end)
{
    char line[256], unit[64], command[128], answer[64] = "done\n";
    double rate = 0;
    uint64_t number, second;
    size_t length = 0;

    while (length < sizeof line - 1 && read(end, line + length, 1) == 1 && line[length] != '\n')
        length++;
    line[length] = 0;
    if (sscanf(line, "start %63[a-z-]", unit) == 1) {
        snprintf(command, sizeof command, "systemctl start %s", unit);
        if (system(command))
            strcpy(answer, "failed\n");
    } else if (sscanf(line, "spin %lu", &number) == 1) {
        snprintf(answer, sizeof answer, "done %lu\n", spin(number));
    } else if (sscanf(line, "dirty %lu %lu %lf", &number, &second, &rate) >= 2 && number) {
        dirty(number, second, rate);
    } else if (sscanf(line, "send %lu", &number) == 1) {
        transfer(end, number, 1);
        return;
    } else if (sscanf(line, "take %lu", &number) == 1) {
        transfer(end, number, 0);
    } else {
        strcpy(answer, "unknown\n");
    }
    put(end, answer, strlen(answer));
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_DFL);
    if (fork() == 0)
        echo();
    int door = listening(WORK_PORT);

    for (;;) {
        int end = accept(door, NULL, NULL);

        /* Twice: the work's process is nobody's child, and system() may wait for its own. */
        pid_t child = fork();

        if (child == 0) {
            if (fork() == 0)
                work(end);
            _exit(0);
        }
        if (child > 0)
            while (wait(NULL) != child)
                ;
        close(end);
    }
}
