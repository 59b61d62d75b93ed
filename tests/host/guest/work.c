/*
 * What the test guest works at. Each kind checks itself and says CORRUPT on the console when memory is not what it
 * must be; "sound" lines are the sign that it still checks.
 *
 * churn      rewrites pages all over anonymous memory and a tmpfs file; each page names itself and its version
 * datagrams  numbered UDP datagrams, one each 5 ms
 * writer N   a word in each of N pages, all of them every 5 ms; checks nothing
 * filler N   N MiB of memory, written once
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, PAGES = 6144, BATCH = 24 };

static uint64_t seed = 88172645463325252ull;

static uint64_t random64(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void fill(uint64_t *page, uint64_t number, uint64_t version)
{
    for (int i = 0; i < WORDS; i++)
        page[i] = (number << 40) ^ (version * 0x9E3779B97F4A7C15ull) ^ i;
}

static int sound(const uint64_t *page, uint64_t number, uint64_t version)
{
    for (int i = 0; i < WORDS; i++)
        if (page[i] != ((number << 40) ^ (version * 0x9E3779B97F4A7C15ull) ^ i))
            return 0;
    return 1;
}

static void churn(void)
{
    static uint32_t versions[PAGES];
    int file = open("/ram/churn", O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, (off_t)PAGES / 2 * PAGE))
        exit(1);
    /* The first half is anonymous, the second a file in tmpfs. */
    char *memory = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *mapped = mmap(memory + (size_t)PAGES / 2 * PAGE, (size_t)PAGES / 2 * PAGE, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED, file, 0);
    if (memory == MAP_FAILED || mapped == MAP_FAILED)
        exit(1);
    for (uint64_t n = 0; n < PAGES; n++)
        fill((uint64_t *)(memory + n * PAGE), n, 0);
    for (uint64_t round = 1;; round++) {
        for (int i = 0; i < BATCH; i++) {
            uint64_t n = random64() % PAGES;
            uint64_t *page = (uint64_t *)(memory + n * PAGE);
            if (!sound(page, n, versions[n]))
                printf("CORRUPT page %lu version %u\n", n, versions[n]);
            fill(page, n, ++versions[n]);
        }
        if (round % 100 == 0)
            printf("sound churn %lu\n", round);
        usleep(3000);
    }
}

static void datagrams(void)
{
    struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons(7001)};
    int channel = socket(AF_INET, SOCK_DGRAM, 0);
    inet_pton(AF_INET, "10.99.0.1", &peer.sin_addr);
    for (unsigned number = 1;; number++) {
        char text[16];
        int length = snprintf(text, sizeof text, "%u", number);
        sendto(channel, text, length, 0, (struct sockaddr *)&peer, sizeof peer);
        usleep(5000);
    }
}

static void writer(size_t pages)
{
    volatile char *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        exit(1);
    for (;;) {
        for (size_t n = 0; n < pages; n++)
            memory[n * PAGE]++;
        usleep(5000);
    }
}

static void filler(size_t mib)
{
    char *memory = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        exit(1);
    memset(memory, 0x5A, mib << 20);
    puts("filled");
    for (;;)
        pause();
}

int main(int count, char **words)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (count == 2 && !strcmp(words[1], "churn"))
        churn();
    if (count == 2 && !strcmp(words[1], "datagrams"))
        datagrams();
    if (count == 3 && !strcmp(words[1], "writer"))
        writer(strtoul(words[2], NULL, 10));
    if (count == 3 && !strcmp(words[1], "filler"))
        filler(strtoul(words[2], NULL, 10));
    return 2;
}
