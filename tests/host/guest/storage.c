/*
 * What the test guest works at on a block device. It checks itself and says CORRUPT on the console when the disk is
 * not what memory says; "sound" lines are the sign that it still checks.
 *
 * ledger DEVICE  writes, zeroes and discards all over the first 32 MiB, and keeps in memory what each sector may hold
 * reads DEVICE   large O_DIRECT reads, several under way all the time; each sector must name itself
 * bench          serves measurements on TCP port 7002: "DEVICE seq|rand BYTES SYNC MILLISECONDS DEPTH SPAN_MIB"
 *
 * A sector that was written names its disk, itself and its version; all else in it follows from these.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR = 512, WORDS = SECTOR / 8, MOST = 512, CHUNK = 256 };

static const char *device;
static uint64_t tag;

static uint64_t random64(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static void fill(uint64_t *sector, uint64_t number, uint64_t version)
{
    sector[0] = tag | number;
    sector[1] = version;
    for (int i = 2; i < WORDS; i++)
        sector[i] = ((tag | number) * 0x9E3779B97F4A7C15ull) ^ (version << 20) ^ i;
}

static int holds(const uint64_t *sector, uint64_t number, uint64_t version)
{
    uint64_t expected[WORDS];
    fill(expected, number, version);
    return !memcmp(sector, expected, SECTOR);
}

static int blank(const uint64_t *sector)
{
    for (int i = 0; i < WORDS; i++)
        if (sector[i])
            return 0;
    return 1;
}

static void *buffer(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        exit(1);
    return memory;
}

static int opened(const char *name, int flags)
{
    char path[32];
    snprintf(path, sizeof path, "/dev/%s", name);
    int file = open(path, O_RDWR | flags);
    if (file < 0) {
        printf("no disk %s\n", name);
        exit(1);
    }
    return file;
}

static uint64_t size_of(int file)
{
    uint64_t bytes = 0;
    ioctl(file, BLKGETSIZE64, &bytes);
    return bytes;
}

static void in_thread(void *(*work)(void *), uintptr_t number)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void *)number))
        exit(1);
}

/*
 * The ledger. Operations are numbered as they begin, and an operation's number is the version that it writes. A sector
 * may hold the version of any operation on it that no later one has surely replaced: `floor` is the oldest such, `last`
 * the newest. Sectors that no operation is under way on have one choice only. Zeroes have a version of their own.
 *
 * The first half is written by several threads by O_DIRECT, with writes of one thread that overlap; the second by one
 * thread through the page cache, with fsync.
 */
enum { AREA = 65536, DIRECT = AREA / 2, WRITERS = 3, PAUSE_US = 2000, BATCH = 6 };
enum { WRITE, ZERO, DISCARD };

static struct { uint32_t floor, last, zero; } ledger[AREA];
static uint32_t counter = 1;
static uint32_t under_way[WRITERS + 1], oldest[WRITERS + 1];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint32_t begin(int writer, int kind, uint32_t first, uint32_t count)
{
    pthread_mutex_lock(&lock);
    uint32_t version = under_way[writer] = oldest[writer] = ++counter;
    for (int i = 0; i <= WRITERS; i++)
        if (under_way[i] && under_way[i] < oldest[writer])
            oldest[writer] = under_way[i];
    for (uint32_t n = first; n < first + count; n++)
        if (kind == WRITE)
            ledger[n].last = version;
        else
            ledger[n].zero = version;
    pthread_mutex_unlock(&lock);
    return version;
}

static void end(int writer, int kind, uint32_t first, uint32_t count)
{
    pthread_mutex_lock(&lock);
    under_way[writer] = 0;
    /* What was discarded may be there still. */
    for (uint32_t n = first; n < first + count && kind != DISCARD; n++)
        if (ledger[n].floor < oldest[writer])
            ledger[n].floor = oldest[writer];
    pthread_mutex_unlock(&lock);
}

static int legal(const uint64_t *sector, uint32_t number, uint32_t floor)
{
    if (blank(sector))
        return ledger[number].zero >= floor;
    uint64_t version = sector[1];
    return version >= floor && version <= ledger[number].last && holds(sector, number, version);
}

/* Reads sectors and compares them with what they may hold. What is being written at that moment is looked at again. */
static void check(int file, uint32_t first, uint32_t count, uint64_t *memory)
{
    static __thread uint32_t floors[CHUNK];
    uint32_t number = first;
    for (int again = 0; again < 4; again++) {
        for (uint32_t n = 0; n < count; n++)
            floors[n] = ledger[first + n].floor;
        if (pread(file, memory, count * SECTOR, (off_t)first * SECTOR) != count * SECTOR) {
            printf("CORRUPT ledger %s: a read failed: %s\n", device, strerror(errno));
            return;
        }
        for (number = first; number < first + count; number++)
            if (!legal(memory + (number - first) * WORDS, number, floors[number - first]))
                break;
        if (number == first + count)
            return;
        usleep(PAUSE_US);
    }
    const uint64_t *sector = memory + (number - first) * WORDS;
    printf("CORRUPT ledger %s: sector %u says %lx version %lu, may hold %u to %u, zero %u\n", device, number, sector[0],
           sector[1], floors[number - first], ledger[number].last, ledger[number].zero);
    exit(1);
}

static void fill_all(uint64_t *memory, uint32_t first, uint32_t count, uint32_t version)
{
    for (uint32_t n = 0; n < count; n++)
        fill(memory + n * WORDS, first + n, version);
}

static void complain_if(int failed, const char *what)
{
    if (failed)
        printf("CORRUPT ledger %s: %s failed: %s\n", device, what, strerror(errno));
}

static uint32_t some_sectors(uint64_t *seed)
{
    static const uint32_t sizes[] = {1, 3, 8, 8, 8, 16, 64, 200, MOST};
    return sizes[random64(seed) % (sizeof sizes / sizeof *sizes)];
}

static void *write_directly(void *number)
{
    int writer = (uintptr_t)number;
    uint64_t seed = 88172645463325252ull + writer * 7919;
    uint64_t *memory = buffer(MOST * SECTOR);
    int file = opened(device, O_DIRECT);
    uint32_t first = 0, count = 1;
    for (;;) {
        if (random64(&seed) % 2)
            first += random64(&seed) % count;
        else
            first = random64(&seed) % DIRECT;
        count = some_sectors(&seed);
        if (first > DIRECT - count)
            first = DIRECT - count;
        uint64_t choice = random64(&seed) % 16;
        int kind = choice == 0 ? ZERO : choice == 1 ? DISCARD : WRITE;
        uint32_t version = begin(writer, kind, first, count);
        uint64_t range[2] = {(uint64_t)first * SECTOR, (uint64_t)count * SECTOR};
        if (kind == ZERO) {
            complain_if(ioctl(file, BLKZEROOUT, range), "to zero");
        } else if (kind == DISCARD) {
            complain_if(ioctl(file, BLKDISCARD, range) && errno != EOPNOTSUPP, "to discard");
        } else {
            fill_all(memory, first, count, version);
            complain_if(pwrite(file, memory, count * SECTOR, (off_t)first * SECTOR) != count * SECTOR, "a write");
        }
        end(writer, kind, first, count);
        usleep(PAUSE_US);
    }
    return number;
}

static void *write_through_the_cache(void *unused)
{
    uint64_t seed = 1442695040888963407ull, *memory = buffer(MOST * SECTOR);
    int cached = opened(device, 0), direct = opened(device, O_DIRECT);
    uint32_t looked = DIRECT;
    for (uint64_t sweeps = 1;;) {
        for (int i = 0; i < BATCH; i++) {
            uint32_t count = some_sectors(&seed), first = DIRECT + random64(&seed) % (AREA - DIRECT - count);
            fill_all(memory, first, count, begin(WRITERS, WRITE, first, count));
            complain_if(pwrite(cached, memory, count * SECTOR, (off_t)first * SECTOR) != count * SECTOR, "a write");
            end(WRITERS, WRITE, first, count);
            usleep(PAUSE_US);
        }
        complain_if(fsync(cached), "fsync");
        for (int i = 0; i < 4; i++, looked += CHUNK)
            check(direct, looked, CHUNK, memory);
        if (looked == AREA) {
            looked = DIRECT;
            printf("sound fsync %s %lu\n", device, sweeps++);
        }
    }
    return unused;
}

static void write_ledger(void)
{
    int file = opened(device, O_DIRECT);
    uint64_t *memory = buffer(MOST * SECTOR);
    if (size_of(file) < (uint64_t)AREA * SECTOR)
        exit(1);
    for (uint32_t first = 0; first < AREA; first += CHUNK) {
        if (pread(file, memory, CHUNK * SECTOR, (off_t)first * SECTOR) != CHUNK * SECTOR)
            exit(1);
        for (uint32_t n = first; n < first + CHUNK; n++) {
            const uint64_t *sector = memory + (n - first) * WORDS;
            if (blank(sector))
                ledger[n].zero = 1;
            else
                ledger[n].last = sector[1];
            ledger[n].floor = blank(sector) ? 1 : sector[1];
            if (ledger[n].last > counter)
                counter = ledger[n].last;
        }
    }
    for (uintptr_t i = 0; i < WRITERS; i++)
        in_thread(write_directly, i);
    in_thread(write_through_the_cache, 0);
    printf("ledger %s begins\n", device);
    for (uint64_t sweeps = 1;; sweeps++) {
        for (uint32_t first = 0; first < DIRECT; first += CHUNK) {
            check(file, first, CHUNK, memory);
            usleep(PAUSE_US / 2);
        }
        printf("sound ledger %s %lu\n", device, sweeps);
    }
}

/* Reads. */

/* Into memory that is used once in a while only: what a checkpoint missed stays missing for some time. */
enum { READERS = 4, READ_BYTES = 1 << 20, PLACES = 8 };

static void *read_on(void *number)
{
    uint64_t seed = 88172645463325252ull + (uintptr_t)number * 104729;
    char *pool = buffer((size_t)PLACES * READ_BYTES);
    int file = opened(device, O_DIRECT);
    uint64_t places = size_of(file) / READ_BYTES;
    for (uint64_t round = 1;; round++) {
        uint64_t *memory = (uint64_t *)(pool + round % PLACES * READ_BYTES);
        uint64_t first = random64(&seed) % places * (READ_BYTES / SECTOR);
        if (pread(file, memory, READ_BYTES, first * SECTOR) != READ_BYTES)
            printf("CORRUPT reads %s: a read failed: %s\n", device, strerror(errno));
        for (uint64_t n = 0; n < READ_BYTES / SECTOR; n++)
            if (memory[n * WORDS] != (tag | (first + n))) {
                printf("CORRUPT reads %s: sector %lu is %lx\n", device, first + n, memory[n * WORDS]);
                break;
            }
        if (round % 25 == 0)
            printf("sound reads %s\n", device);
    }
    return number;
}

/* Measurements, by the guest's own clock, which stands still while the guest does. */

enum { BENCH_PORT = 7002, MOST_DEPTH = 16, MOST_TIMES = 1 << 17 };

static struct {
    int random, sync;
    uint64_t bytes, span, until_ns;
    _Atomic uint64_t next, done;
    uint32_t times_us[MOST_TIMES];
} bench;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void *bench_on(void *number)
{
    uint64_t seed = 88172645463325252ull + (uintptr_t)number * 7919, places = bench.span / bench.bytes;
    uint64_t *memory = buffer(bench.bytes);
    int file = opened(device, O_DIRECT);
    memset(memory, 0xA5, bench.bytes);
    for (uint64_t start; (start = now_ns()) < bench.until_ns;) {
        uint64_t place = (bench.random ? random64(&seed) : bench.next++) % places;
        memory[0] = start;
        if (pwrite(file, memory, bench.bytes, place * bench.bytes) != (ssize_t)bench.bytes ||
            (bench.sync && fdatasync(file)))
            printf("CORRUPT bench: a write failed: %s\n", strerror(errno));
        uint64_t mine = bench.done++;
        if (mine < MOST_TIMES)
            bench.times_us[mine] = (now_ns() - start) / 1000;
    }
    munmap(memory, bench.bytes);
    close(file);
    return NULL;
}

static int by_size(const void *one, const void *other)
{
    uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;
    return (a > b) - (a < b);
}

static void measure(char *line, int peer)
{
    char name[16], pattern[8], reply[128];
    unsigned length_ms, depth, span_mib;
    if (sscanf(line, "%15s %7s %lu %d %u %u %u", name, pattern, &bench.bytes, &bench.sync, &length_ms, &depth,
               &span_mib) != 7 || depth > MOST_DEPTH)
        return;
    pthread_t threads[MOST_DEPTH];
    device = name;
    bench.random = !strcmp(pattern, "rand");
    bench.span = (uint64_t)span_mib << 20;
    bench.next = bench.done = 0;
    uint64_t start = now_ns();
    bench.until_ns = start + length_ms * 1000000ull;
    for (uintptr_t i = 0; i < depth; i++)
        if (pthread_create(&threads[i], NULL, bench_on, (void *)i))
            exit(1);
    for (unsigned i = 0; i < depth; i++)
        pthread_join(threads[i], NULL);
    uint64_t took_us = (now_ns() - start) / 1000, number = bench.done < MOST_TIMES ? bench.done : MOST_TIMES;
    qsort(bench.times_us, number, sizeof *bench.times_us, by_size);
    int length = snprintf(reply, sizeof reply, "%lu %lu %u %u %u\n", (uint64_t)bench.done, took_us,
                          bench.times_us[number / 2], bench.times_us[number * 99 / 100], bench.times_us[number - 1]);
    if (write(peer, reply, length) != length)
        printf("nobody hears the measurement\n");
}

static void serve_bench(void)
{
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons(BENCH_PORT)};
    int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&own, sizeof own) || listen(listener, 1))
        exit(1);
    for (;;) {
        char line[128];
        int peer = accept(listener, NULL, NULL);
        ssize_t length;
        while ((length = read(peer, line, sizeof line - 1)) > 0) {
            line[length] = 0;
            measure(line, peer);
        }
        close(peer);
    }
}

int main(int count, char **words)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (count == 2 && !strcmp(words[1], "bench"))
        serve_bench();
    if (count != 3)
        return 2;
    device = words[2];
    tag = (uint64_t)device[2] << 48;
    if (!strcmp(words[1], "ledger"))
        write_ledger();
    if (!strcmp(words[1], "reads")) {
        for (uintptr_t i = 1; i < READERS; i++)
            in_thread(read_on, i);
        read_on(0);
    }
    return 2;
}
