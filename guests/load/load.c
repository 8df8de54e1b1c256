/*
 * Loads for measuring split drivers, in a guest or in domain 0. Static, so that it runs in any initramfs.
 *
 *   load block DEVICE read|write|flush seq|rand SIZE DEPTH MILLISECONDS
 *   load sink tcp|udp ADDRESS PORT            prints "LOAD LISTENING", then what came
 *   load push tcp|udp ADDRESS PORT SIZE MILLISECONDS
 *   load echo ADDRESS PORT                    answers UDP packets until one of one byte comes
 *   load ping ADDRESS PORT SIZE COUNT
 *   load flood DEVICE BYTES
 *   load offload INTERFACE on|off             segmentation of what is sent
 *
 * Each ends with one line: LOAD {JSON}. Times are nanoseconds of CLOCK_MONOTONIC; latencies are sorted and
 * given as percentiles. Exit status 1 and "LOAD {"error": ...}" when anything goes wrong.
 *
 * Facts: O_DIRECT and Linux's own asynchronous I/O (io_submit) keep DEPTH requests under way from one thread
 * and leave the guest's page cache out. "flush" is a write followed by fdatasync, one at a time.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/ethtool.h>
#include <linux/fs.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAX_DEPTH 64
#define MAX_SIZE (4 << 20)
#define MAX_TIMES (1 << 20)
/* How long anybody waits for the other end, milliseconds. */
#define PATIENCE 60000

static uint32_t times[MAX_TIMES]; /* latencies, ns, at most 4 s each */
static uint64_t timed;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

__attribute__((noreturn)) static void fail(const char *what) {
    printf("LOAD {\"error\": \"%s: %s\"}\n", what, errno ? strerror(errno) : "wrong");
    exit(1);
}

static uint64_t number(const char *text, uint64_t most) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (*end || end == text || errno || value > most) {
        errno = EINVAL;
        fail(text);
    }
    return value;
}

static void took(uint64_t since) {
    uint64_t ns = now() - since;
    if (timed < MAX_TIMES) times[timed++] = ns > UINT32_MAX ? UINT32_MAX : ns;
}

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void report(uint64_t ops, uint64_t bytes, uint64_t ns) {
    printf("LOAD {\"ops\": %llu, \"bytes\": %llu, \"ns\": %llu", (unsigned long long)ops,
           (unsigned long long)bytes, (unsigned long long)ns);
    if (timed) {
        qsort(times, timed, sizeof *times, by_size);
        printf(", \"p50\": %u, \"p99\": %u, \"max\": %u", times[timed / 2], times[timed - 1 - timed / 100],
               times[timed - 1]);
    }
    printf("}\n");
}

/* --- block */

static uint64_t seed = 88172645463325252u;

static uint64_t dice(void) { /* xorshift */
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

struct disk {
    int fd, sequential;
    uint64_t size, units, next;
};

static uint64_t place(struct disk *disk) {
    uint64_t unit = disk->sequential ? disk->next++ % disk->units : dice() % disk->units;
    return unit * disk->size;
}

static void block_flush(struct disk *disk, char *data, uint64_t span) {
    uint64_t begin = now(), ops = 0;
    while (now() - begin < span || !ops) {
        uint64_t at = now();
        if (pwrite(disk->fd, data, disk->size, place(disk)) != (ssize_t)disk->size) fail("write");
        if (fdatasync(disk->fd)) fail("fdatasync");
        took(at);
        ops++;
    }
    report(ops, ops * disk->size, now() - begin);
}

static void block_queue(struct disk *disk, char *data, int depth, int opcode, uint64_t span) {
    struct iocb cbs[MAX_DEPTH], *list[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    uint64_t started[MAX_DEPTH];
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, depth, &context)) fail("io_setup");
    int ready = depth, flying = 0;
    for (int i = 0; i < depth; i++) {
        memset(&cbs[i], 0, sizeof cbs[i]);
        cbs[i].aio_fildes = disk->fd;
        cbs[i].aio_lio_opcode = opcode;
        cbs[i].aio_buf = (uintptr_t)(data + i * disk->size);
        cbs[i].aio_nbytes = disk->size;
        cbs[i].aio_data = i;
        list[i] = &cbs[i];
    }
    uint64_t begin = now(), ops = 0;
    for (int running = 1; running || flying;) {
        if (running && ready) {
            uint64_t at = now();
            for (int i = 0; i < ready; i++) {
                list[i]->aio_offset = place(disk);
                started[list[i]->aio_data] = at;
            }
            for (int done = 0; done < ready;) {
                long count = syscall(SYS_io_submit, context, ready - done, list + done);
                if (count < 0 && errno != EAGAIN) fail("io_submit");
                if (count > 0) done += count;
            }
            flying += ready;
            ready = 0;
        }
        long count = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
        if (count < 0) {
            if (errno == EINTR) continue;
            fail("io_getevents");
        }
        for (int i = 0; i < count; i++) {
            if (events[i].res != (int64_t)disk->size) {
                errno = events[i].res < 0 ? -events[i].res : EIO;
                fail(opcode == IOCB_CMD_PREAD ? "read" : "write");
            }
            took(started[events[i].data]);
            list[ready++] = &cbs[events[i].data];
        }
        flying -= count;
        ops += count;
        running = now() - begin < span;
    }
    report(ops, ops * disk->size, now() - begin);
    syscall(SYS_io_destroy, context);
}

static void block(char **argv) {
    int flush = !strcmp(argv[1], "flush"), reading = !strcmp(argv[1], "read");
    struct disk disk = {.sequential = !strcmp(argv[2], "seq"), .size = number(argv[3], MAX_SIZE)};
    int depth = number(argv[4], MAX_DEPTH);
    uint64_t span = number(argv[5], 600000) * 1000000, whole;
    disk.fd = open(argv[0], (reading ? O_RDONLY : O_RDWR) | O_DIRECT | O_CLOEXEC);
    if (disk.fd < 0) fail(argv[0]);
    if (ioctl(disk.fd, BLKGETSIZE64, &whole)) fail("BLKGETSIZE64");
    errno = EINVAL;
    if (!disk.size || disk.size % 512 || !depth || whole < disk.size) fail("size or depth");
    disk.units = whole / disk.size;
    char *data;
    if (posix_memalign((void **)&data, 4096, depth * disk.size)) fail("memory");
    for (uint64_t i = 0; i < depth * disk.size; i += 8) *(uint64_t *)(data + i) = dice();
    if (flush)
        block_flush(&disk, data, span);
    else
        block_queue(&disk, data, depth, reading ? IOCB_CMD_PREAD : IOCB_CMD_PWRITE, span);
}

/* --- net */

static struct sockaddr_in address(char **argv) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(number(argv[1], 65535))};
    errno = EINVAL;
    if (inet_pton(AF_INET, argv[0], &to.sin_addr) != 1) fail(argv[0]);
    return to;
}

static int sock(int type) {
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0), on = 1, room = 4 << 20;
    if (fd < 0) fail("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (type == SOCK_DGRAM) setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    return fd;
}

static int readable(int fd, int milliseconds) {
    struct pollfd one = {.fd = fd, .events = POLLIN};
    return poll(&one, 1, milliseconds) > 0;
}

static int open_sink(int type, char **argv) {
    struct sockaddr_in at = address(argv);
    int fd = sock(type);
    if (bind(fd, (struct sockaddr *)&at, sizeof at)) fail("bind");
    if (type == SOCK_STREAM && listen(fd, 1)) fail("listen");
    printf("LOAD LISTENING\n");
    fflush(stdout);
    return fd;
}

/* From the first byte or packet to the last one. UDP: packets of one byte say that it is over. */
static void sink(int type, char **argv) {
    static char room[1 << 17];
    int fd = open_sink(type, argv);
    uint64_t ops = 0, bytes = 0, first = 0, last = 0;
    errno = ETIMEDOUT;
    if (!readable(fd, PATIENCE)) fail("nobody came");
    if (type == SOCK_STREAM) {
        fd = accept(fd, NULL, NULL);
        if (fd < 0) fail("accept");
    }
    for (;;) {
        errno = ETIMEDOUT;
        if (!readable(fd, type == SOCK_STREAM ? PATIENCE : 2000)) {
            if (type == SOCK_STREAM) fail("the sender is silent");
            break; /* the packets that say it is over were lost, too */
        }
        ssize_t size = recv(fd, room, sizeof room, 0);
        if (size < 0) fail("recv");
        if (size == 0 || (type == SOCK_DGRAM && size == 1)) break;
        last = now();
        if (!first) {
            first = last;
            if (type == SOCK_DGRAM) continue; /* an interval fewer than packets */
        }
        ops++;
        bytes += size;
    }
    report(ops, bytes, last - first);
}

static void push(int type, char **argv) {
    static char data[1 << 17];
    struct sockaddr_in to = address(argv);
    uint64_t size = number(argv[2], sizeof data), span = number(argv[3], 600000) * 1000000;
    int fd = sock(type);
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) fail("connect");
    uint64_t begin = now(), ops = 0, bytes = 0, refused = 0;
    while (now() - begin < span) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0) {
            /* No room now. Counted, else a loop that never sends would look like a slow one. */
            if (type == SOCK_DGRAM && errno == ENOBUFS && ++refused < 1000000) continue;
            fail("send");
        }
        ops++;
        bytes += sent;
    }
    uint64_t ns = now() - begin;
    if (type == SOCK_STREAM) {
        shutdown(fd, SHUT_WR);
    } else {
        for (int i = 0; i < 5; i++) {
            usleep(20000); /* what came before is delivered first */
            send(fd, data, 1, MSG_NOSIGNAL);
        }
    }
    report(ops, bytes, ns);
}

static void echo(char **argv) {
    static char room[1 << 16];
    int fd = open_sink(SOCK_DGRAM, argv);
    uint64_t ops = 0, begin = now();
    for (;;) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        errno = ETIMEDOUT;
        if (!readable(fd, PATIENCE)) fail("nobody came");
        ssize_t size = recvfrom(fd, room, sizeof room, 0, (struct sockaddr *)&from, &length);
        if (size < 0) fail("recv");
        if (size == 1) break;
        if (sendto(fd, room, size, 0, (struct sockaddr *)&from, length) < 0) fail("send");
        ops++;
    }
    report(ops, 0, now() - begin);
}

static void ping(char **argv) {
    static char room[1 << 16];
    struct sockaddr_in to = address(argv);
    uint64_t size = number(argv[2], sizeof room), count = number(argv[3], MAX_TIMES), lost = 0;
    int fd = sock(SOCK_DGRAM);
    if (connect(fd, (struct sockaddr *)&to, sizeof to)) fail("connect");
    uint64_t begin = now();
    for (uint64_t i = 0; i < count; i++) {
        uint64_t at = now();
        if (send(fd, room, size, 0) < 0) fail("send");
        errno = ETIMEDOUT;
        if (!readable(fd, 1000)) {
            if (++lost > 3) fail("no answers");
            continue;
        }
        if (recv(fd, room, sizeof room, 0) < 0) fail("recv");
        took(at);
    }
    uint64_t ns = now() - begin;
    for (int i = 0; i < 3; i++) send(fd, room, 1, MSG_NOSIGNAL); /* one may be lost */
    report(timed, timed * size, ns);
}

static void set_one(int fd, const char *name, uint32_t command, uint32_t on) {
    struct ethtool_value value = {.cmd = command, .data = on};
    struct ifreq request;
    memset(&request, 0, sizeof request);
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    request.ifr_data = (void *)&value;
    if (ioctl(fd, SIOCETHTOOL, &request)) fail(command == ETHTOOL_STSO ? "ETHTOOL_STSO" : "ETHTOOL_SGSO");
}

static void offload(const char *name, const char *state) {
    int fd = sock(SOCK_DGRAM), on = !strcmp(state, "on");
    set_one(fd, name, ETHTOOL_STSO, on);
    set_one(fd, name, ETHTOOL_SGSO, on);
    report(2, 0, 0);
}

/* --- console */

static void flood(char **argv) {
    static char data[4096];
    uint64_t bytes = number(argv[1], 1u << 30), left = bytes;
    int fd = open(argv[0], O_WRONLY | O_NOCTTY | O_CLOEXEC);
    if (fd < 0) fail(argv[0]);
    struct termios before, raw;
    if (tcgetattr(fd, &before)) fail("tcgetattr");
    raw = before;
    raw.c_oflag &= ~OPOST; /* so that the bytes are as many as were written */
    if (tcsetattr(fd, TCSANOW, &raw)) fail("tcsetattr");
    for (unsigned i = 0; i < sizeof data; i++) data[i] = i % 64 == 63 ? '\n' : 'a' + i % 26;
    uint64_t begin = now();
    while (left) {
        ssize_t done = write(fd, data, left < sizeof data ? left : sizeof data);
        if (done < 0 && errno != EINTR) fail("write");
        if (done > 0) left -= done;
    }
    tcdrain(fd);
    uint64_t ns = now() - begin;
    tcsetattr(fd, TCSANOW, &before);
    printf("\n");
    report(1, bytes, ns);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    const char *kind = argc > 2 ? argv[2] : "";
    int type = !strcmp(kind, "udp") ? SOCK_DGRAM : SOCK_STREAM;
    if (!strcmp(what, "block") && argc == 8)
        block(argv + 2);
    else if (!strcmp(what, "sink") && argc == 5)
        sink(type, argv + 3);
    else if (!strcmp(what, "push") && argc == 7)
        push(type, argv + 3);
    else if (!strcmp(what, "echo") && argc == 4)
        echo(argv + 2);
    else if (!strcmp(what, "ping") && argc == 6)
        ping(argv + 2);
    else if (!strcmp(what, "flood") && argc == 4)
        flood(argv + 2);
    else if (!strcmp(what, "offload") && argc == 4)
        offload(argv[2], argv[3]);
    else {
        errno = EINVAL;
        fail("arguments");
    }
    return 0;
}
