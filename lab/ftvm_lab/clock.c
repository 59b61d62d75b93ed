/* The wall clock of a compute host's services: this machine's, and as many seconds more as a file says.
 *
 * Preloaded. The file holds one 64-bit number and is mapped, so that a clock jumps while its programs run. All other
 * clocks are as they are. Waits until a wall-clock time are not changed: those of these programs count monotonically.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t none = 0;
static const volatile int64_t *offset_s = &none;
static int (*real_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void map_offset(void)
{
    real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("FTVM_LAB_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *map = mmap(NULL, sizeof *offset_s, PROT_READ, MAP_SHARED, file, 0);
    if (map != MAP_FAILED)
        offset_s = map;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    /* Other libraries' constructors may ask before ours has run. */
    int failed = real_gettime ? real_gettime(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *offset_s;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec read;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &read))
        return -1;
    now->tv_sec = read.tv_sec;
    now->tv_usec = read.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec read;
    clock_gettime(CLOCK_REALTIME_COARSE, &read);
    if (now)
        *now = read.tv_sec;
    return read.tv_sec;
}
