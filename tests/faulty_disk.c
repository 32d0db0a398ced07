/* A disk that fails when told to: preloaded into a process, counts every operation that changes files under a folder,
 * and at the n-th kills the process, as a power cut would, or says that the disk is full: from then on, or only then. A
 * write that is cut off has written half of its bytes. See faulty_disk.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { COUNT, KILL, FULL, FULL_ONCE };
enum fate { GO_ON, HALF_THEN_DIE, NO_SPACE };

static char root[PATH_MAX];
static long at_operation;
static int mode;
static atomic_long operations;
static char kinds[100000]; /* of the operations: open, write, truncate, sync, mkdir, rename, unlink, by first letter */

void disk_arm(const char *folder, long at, int how) {
    snprintf(root, sizeof root, "%s", folder);
    at_operation = at;
    mode = how;
    operations = 0;
    memset(kinds, 0, sizeof kinds);
}

long disk_operations(void) { return operations; }
const char *disk_kinds(void) { return kinds; }

static int is_inside(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int is_open_inside(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}

static int is_at_inside(int folder, const char *path) {
    return path[0] == '/' || folder == AT_FDCWD ? is_inside(path) : is_open_inside(folder);
}

/* What becomes of the next operation; one that takes something away is none the worse for a full disk. */
static enum fate next(int inside, char kind) {
    int saved = errno;
    if (!inside) return GO_ON;
    long number = operations++;
    if (number < (long)sizeof kinds - 1) kinds[number] = kind;
    errno = saved;
    if (mode == KILL && number == at_operation) {
        if (kind == 'w') return HALF_THEN_DIE;
        kill(getpid(), SIGKILL);
    }
    int is_full = (mode == FULL && number >= at_operation) || (mode == FULL_ONCE && number == at_operation);
    if (is_full && kind != 'u') {
        errno = ENOSPC;
        return NO_SPACE;
    }
    return GO_ON;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define PASS(inside, kind, call) return next(inside, kind) == NO_SPACE ? -1 : (call)

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define MODE_OF(flags) \
    mode_t permissions = 0; \
    if (flags & O_CREAT) { \
        va_list rest; \
        va_start(rest, flags); \
        permissions = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags) \
        PASS(writes(flags) && is_inside(path), 'o', real(path, flags, permissions)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags) \
        PASS(writes(flags) && is_at_inside(folder, path), 'o', real(folder, path, flags, permissions)); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CUT_OFF(half) \
    do { \
        (void)!(half); \
        kill(getpid(), SIGKILL); \
    } while (0)

ssize_t write(int descriptor, const void *bytes, size_t count) {
    REAL(write);
    enum fate fate = next(is_open_inside(descriptor), 'w');
    if (fate == HALF_THEN_DIE) CUT_OFF(real(descriptor, bytes, count / 2));
    return fate == NO_SPACE ? -1 : real(descriptor, bytes, count);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t count, off64_t offset) {
    REAL(pwrite64);
    enum fate fate = next(is_open_inside(descriptor), 'w');
    if (fate == HALF_THEN_DIE) CUT_OFF(real(descriptor, bytes, count / 2, offset));
    return fate == NO_SPACE ? -1 : real(descriptor, bytes, count, offset);
}

int ftruncate(int descriptor, off_t length) {
    REAL(ftruncate);
    PASS(is_open_inside(descriptor), 't', real(descriptor, length));
}
int ftruncate64(int descriptor, off64_t length) {
    REAL(ftruncate64);
    PASS(is_open_inside(descriptor), 't', real(descriptor, length));
}
/* Nothing is flushed: what a process has written outlives it all the same, and no test outlives the machine. */
int fsync(int descriptor) {
    REAL(fsync);
    if (!is_open_inside(descriptor)) return real(descriptor);
    PASS(1, 's', 0);
}
int mkdir(const char *path, mode_t permissions) {
    REAL(mkdir);
    PASS(is_inside(path), 'm', real(path, permissions));
}
int rename(const char *from, const char *to) {
    REAL(rename);
    PASS(is_inside(to), 'r', real(from, to));
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    PASS(is_at_inside(to_folder, to), 'r', real(from_folder, from, to_folder, to));
}
int unlink(const char *path) {
    REAL(unlink);
    PASS(is_inside(path), 'u', real(path));
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    PASS(is_at_inside(folder, path), 'u', real(folder, path, flags));
}
int rmdir(const char *path) {
    REAL(rmdir);
    PASS(is_inside(path), 'u', real(path));
}
