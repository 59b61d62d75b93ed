/*
 * The guest's clocks, told over UDP: each datagram to port 7012 comes back with the four numbers below behind it, in ns.
 *
 *   CLOCK_REALTIME CLOCK_MONOTONIC CLOCK_MONOTONIC_RAW SPREAD
 *
 * An NTP client slews the first two alike; only a step tells them apart. The third is what the hardware counts. All are
 * read within SPREAD ns of the guest's time.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { PORT = 7012, QUESTION = 64, TRIES = 5 };

struct clocks { int64_t real, mono, raw, spread; };

static int64_t ns(clockid_t clock)
{
    struct timespec time;

    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static struct clocks once(void)
{
    int64_t before = ns(CLOCK_MONOTONIC), real = ns(CLOCK_REALTIME), raw = ns(CLOCK_MONOTONIC_RAW);
    int64_t after = ns(CLOCK_MONOTONIC);

    return (struct clocks){real, before + (after - before) / 2, raw, after - before};
}

/* The best of some: another process, or an interrupt, may come between two looks. */
static struct clocks all(void)
{
    struct clocks best = once();

    for (int i = 1; i < TRIES; i++) {
        struct clocks next = once();

        if (next.spread < best.spread)
            best = next;
    }
    return best;
}

int main(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    int end = socket(AF_INET, SOCK_DGRAM, 0);

    if (bind(end, (struct sockaddr *)&address, sizeof address) < 0) {
        perror("bind");
        return 1;
    }
    for (;;) {
        char question[QUESTION + 1], answer[QUESTION + 128];
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t size = recvfrom(end, question, QUESTION, 0, (struct sockaddr *)&from, &length);

        if (size < 0)
            continue;
        question[size] = 0;
        struct clocks seen = all();
        int used = snprintf(answer, sizeof answer, "%s %lld %lld %lld %lld", question, (long long)seen.real,
                            (long long)seen.mono, (long long)seen.raw, (long long)seen.spread);

        sendto(end, answer, used, 0, (struct sockaddr *)&from, length);
    }
}
