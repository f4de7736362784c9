// Reads and writes of a file with many pieces in flight at once, by io_uring and no library. Plain C ABI.
//
// A ring is used by one thread at a time. The kernel fills and empties the two queues from the other side, so their
// ends are read and published with acquire and release.

#include <errno.h>
#include <linux/io_uring.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct piece {
    char *address;
    uint64_t offset; // in the file
    uint32_t num_bytes;
    uint32_t next; // in the list of free pieces
};

struct ring {
    int descriptor;
    unsigned depth;
    int broken; // the kernel refused it once
    void *queues; // both: the kernel maps them as one
    size_t queues_bytes;
    struct io_uring_sqe *entries;
    size_t entries_bytes;
    unsigned *sq_tail, *sq_mask, *sq_array;
    unsigned *cq_head, *cq_tail, *cq_mask;
    struct io_uring_cqe *done;
    struct piece *pieces; // as many as may be in flight
};

void uring_close(struct ring *ring) {
    if (!ring) return;
    if (ring->queues) munmap(ring->queues, ring->queues_bytes);
    if (ring->entries) munmap(ring->entries, ring->entries_bytes);
    if (ring->descriptor >= 0) close(ring->descriptor);
    free(ring->pieces);
    free(ring);
}

// Returns a ring for so many pieces at once; NULL with an errno where the kernel allows none.
struct ring *uring_open(unsigned depth, int *error) {
    struct io_uring_params found;
    memset(&found, 0, sizeof found);
    struct ring *ring = calloc(1, sizeof *ring);
    if (!ring) {
        *error = ENOMEM;
        return NULL;
    }
    ring->descriptor = (int)syscall(SYS_io_uring_setup, depth, &found);
    if (ring->descriptor < 0) goto failed;
    if (!(found.features & IORING_FEAT_SINGLE_MMAP) || !(found.features & IORING_FEAT_NODROP)) {
        errno = ENOSYS; // older than 5.5
        goto failed;
    }
    ring->depth = depth;
    size_t submitted = found.sq_off.array + found.sq_entries * sizeof(unsigned);
    size_t completed = found.cq_off.cqes + found.cq_entries * sizeof(struct io_uring_cqe);
    size_t queues_bytes = submitted > completed ? submitted : completed;
    char *queues = mmap(NULL, queues_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->descriptor,
                        IORING_OFF_SQ_RING);
    if (queues == MAP_FAILED) goto failed;
    ring->queues = queues;
    ring->queues_bytes = queues_bytes;
    size_t entries_bytes = found.sq_entries * sizeof(struct io_uring_sqe);
    void *entries = mmap(NULL, entries_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->descriptor,
                         IORING_OFF_SQES);
    if (entries == MAP_FAILED) goto failed;
    ring->entries = entries;
    ring->entries_bytes = entries_bytes;
    ring->pieces = calloc(depth, sizeof *ring->pieces);
    if (!ring->pieces) {
        errno = ENOMEM;
        goto failed;
    }
    ring->sq_tail = (unsigned *)(queues + found.sq_off.tail);
    ring->sq_mask = (unsigned *)(queues + found.sq_off.ring_mask);
    ring->sq_array = (unsigned *)(queues + found.sq_off.array);
    ring->cq_head = (unsigned *)(queues + found.cq_off.head);
    ring->cq_tail = (unsigned *)(queues + found.cq_off.tail);
    ring->cq_mask = (unsigned *)(queues + found.cq_off.ring_mask);
    ring->done = (struct io_uring_cqe *)(queues + found.cq_off.cqes);
    return ring;
failed:
    *error = errno;
    uring_close(ring);
    return NULL;
}

static void push(struct ring *ring, int file, int writes, unsigned number) {
    unsigned tail = *ring->sq_tail, slot = tail & *ring->sq_mask;
    const struct piece *piece = &ring->pieces[number];
    struct io_uring_sqe *entry = &ring->entries[slot];
    memset(entry, 0, sizeof *entry);
    entry->opcode = writes ? IORING_OP_WRITE : IORING_OP_READ;
    entry->fd = file;
    entry->addr = (uint64_t)(uintptr_t)piece->address;
    entry->len = piece->num_bytes;
    entry->off = piece->offset;
    entry->user_data = number;
    ring->sq_array[slot] = slot;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
}

// Moves num_bytes between memory and a file in pieces; returns 0, an errno, or -1 where the file ended too early.
// When it returns nothing is in flight, whatever happened.
int uring_move(struct ring *ring, int file, int writes, char *address, uint64_t num_bytes, uint64_t offset,
               uint32_t piece_bytes) {
    const unsigned none = ring->depth;
    unsigned free_piece = 0, in_flight = 0, unsubmitted = 0;
    uint64_t begun = 0;
    int error = ring->broken ? EIO : 0;
    for (unsigned i = 0; i < ring->depth; i++) ring->pieces[i].next = i + 1; // the last one: none
    while (in_flight || (begun < num_bytes && !error)) {
        while (begun < num_bytes && !error && free_piece != none) {
            unsigned number = free_piece;
            struct piece *piece = &ring->pieces[number];
            uint64_t left = num_bytes - begun;
            free_piece = piece->next;
            piece->address = address + begun;
            piece->offset = offset + begun;
            piece->num_bytes = (uint32_t)(left < piece_bytes ? left : piece_bytes);
            begun += piece->num_bytes;
            push(ring, file, writes, number);
            in_flight++, unsubmitted++;
        }
        if (ring->broken) {
            sched_yield(); // what is in flight ends by itself
        } else {
            long taken = syscall(SYS_io_uring_enter, ring->descriptor, unsubmitted, 1, IORING_ENTER_GETEVENTS, NULL, 0);
            if (taken >= 0) {
                unsubmitted -= (unsigned)taken;
            } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) { // with those completions make room
                error = errno;
                ring->broken = 1;
                __atomic_store_n(ring->sq_tail, *ring->sq_tail - unsubmitted, __ATOMIC_RELEASE);
                in_flight -= unsubmitted;
                unsubmitted = 0;
            }
        }
        unsigned head = *ring->cq_head, tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++) {
            const struct io_uring_cqe *done = &ring->done[head & *ring->cq_mask];
            unsigned number = (unsigned)done->user_data;
            struct piece *piece = &ring->pieces[number];
            int moved = done->res;
            int again = moved == -EINTR || moved == -EAGAIN;
            if (moved < 0 && !again && !error) error = -moved;
            if (moved == 0 && !error) error = writes ? ENOSPC : -1;
            if (moved > 0) {
                piece->address += moved;
                piece->offset += (unsigned)moved;
                piece->num_bytes -= (unsigned)moved;
                again = piece->num_bytes > 0;
            }
            if (again && !error) {
                push(ring, file, writes, number); // its place in the queue is free: no more than depth are in flight
                unsubmitted++;
            } else {
                piece->next = free_piece;
                free_piece = number;
                in_flight--;
            }
        }
        __atomic_store_n(ring->cq_head, head, __ATOMIC_RELEASE);
    }
    return error;
}
