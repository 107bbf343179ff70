// What all processes of one virtual machine share: its cards and who holds how much of them.
//
// The file is made by autobatch/virtual/state.py, which names the same fields at the same offsets; a change here is a
// new STATE_VERSION in both. All sizes are bytes.
#ifndef AUTOBATCH_STATE_H
#define AUTOBATCH_STATE_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define STATE_MAGIC "abvgpu\r\n"
#define STATE_VERSION 2
#define STATE_VARIABLE "AUTOBATCH_VIRTUAL_STATE"
#define MAX_CARDS 64
#define MAX_ENTRIES 4096

struct state_card {
  char title[96];
  char uuid[48];  // "GPU-" and 36 characters, as NVML writes it
  uint64_t total_bytes;
  uint64_t outside_bytes;  // what a context takes beside the allocator
  int32_t capability_major, capability_minor;
  int32_t multiprocessors;
  int32_t unused;
};

enum entry_status { ENTRY_FREE = 0, ENTRY_ALIVE = 1, ENTRY_GONE = 2 };

// One process on one card. An entry of a dead process stays, so that its peak can be told, until its place is needed.
struct state_entry {
  int64_t pid;
  uint64_t started;  // clock ticks after boot, field 22 of /proc/PID/stat: a process id alone may be used again
  uint32_t card;
  uint32_t status;
  uint64_t used_bytes;
  uint64_t peak_bytes;
  uint64_t refused;  // allocations that did not fit
};

struct state {
  char magic[8];
  uint32_t version;
  uint32_t card_count;
  uint32_t entry_count;  // places in use or used before; the rest were never touched
  uint32_t fail_count;   // how many in a row are refused from there on
  int64_t fail_allocation;  // refuse the allocation with this number, counted from 1 over all processes; 0 for none
  int64_t allocations;
  union {
    pthread_mutex_t mutex;  // process-shared and robust: it survives a holder that is killed, and a fork
    char space[64];
  } lock;
  struct state_card cards[MAX_CARDS];
  struct state_entry entries[MAX_ENTRIES];
};

// The mapped state, or NULL with the reason on stderr (once): not named, unreadable, of another version.
struct state *state_open(void);

// Gives this process a place on `card` with `card->outside_bytes` in use. False if they do not fit.
int state_join(struct state *state, uint32_t card, struct state_entry **entry);
// Takes `bytes` for this entry; false, and counted, if they do not fit or this allocation is the one told to fail.
int state_take(struct state *state, struct state_entry *entry, uint64_t bytes);
void state_give(struct state *state, struct state_entry *entry, uint64_t bytes);
// Bytes in use on `card` by all living processes.
uint64_t state_used(struct state *state, uint32_t card);
// Copies the living entries of `card` to `out` and returns how many there are, which may be more than `room`.
unsigned state_processes(struct state *state, uint32_t card, struct state_entry *out, unsigned room);

#endif
