// The shared state: opening it, its lock, and the accounts of each process.
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static struct state *refuse(const char *path, const char *why) {
  fprintf(stderr, "autobatch: no virtual GPU in process %d: " STATE_VARIABLE "%s%s %s\n", (int)getpid(),
          path ? "=" : "", path ? path : "", why);
  return NULL;
}

// A file of the wrong size would be mapped and then kill the process with SIGBUS, so the size is part of the check.
static struct state *map(const char *path) {
  int file = open(path, O_RDWR | O_CLOEXEC);
  struct stat about;
  if (file < 0 || fstat(file, &about)) {
    const char *why = strerror(errno);
    if (file >= 0) close(file);
    return refuse(path, why);
  }
  if (about.st_size != (off_t)sizeof(struct state)) {
    close(file);
    return refuse(path, "is not a state file of this version of autobatch");
  }
  struct state *state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (state == MAP_FAILED) return refuse(path, strerror(errno));
  if (memcmp(state->magic, STATE_MAGIC, sizeof state->magic) || state->version != STATE_VERSION ||
      state->card_count > MAX_CARDS || state->entry_count > MAX_ENTRIES) {
    munmap(state, sizeof *state);
    return refuse(path, "is not a state file of this version of autobatch");
  }
  return state;
}

struct state *state_open(void) {
  const char *path = getenv(STATE_VARIABLE);
  if (!path || !*path) return refuse(NULL, "is not set");
  return map(path);
}

// The robust mutex tells when its last holder died inside. The accounts are then still sums of whole numbers, at worst
// short of the dead one's last change, and its entry is reaped, so there is nothing to repair.
static void lock(struct state *state) {
  if (pthread_mutex_lock(&state->lock.mutex) == EOWNERDEAD) pthread_mutex_consistent(&state->lock.mutex);
}

static void unlock(struct state *state) { pthread_mutex_unlock(&state->lock.mutex); }

#define UNKNOWN UINT64_MAX

// When `pid` started; 0 if there is no such process, UNKNOWN if it is hidden from us. A zombie holds no memory, so it
// counts as gone.
static uint64_t started(int64_t pid) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return kill((pid_t)pid, 0) && errno == ESRCH ? 0 : UNKNOWN;
  ssize_t length = read(file, text, sizeof text - 1);
  close(file);
  if (length <= 0) return 0;
  text[length] = 0;
  // The second field is the command in parentheses and may hold anything, spaces and parentheses too.
  char *field = strrchr(text, ')');
  if (!field || !field[1] || field[2] == 'Z' || field[2] == 'X') return 0;
  field += 2;
  for (int i = 3; i < 22; i++) {
    field = strchr(field, ' ');
    if (!field) return 0;
    field++;
  }
  return strtoull(field, NULL, 10);
}

static void reap(struct state *state) {
  int64_t self = getpid();
  for (uint32_t i = 0; i < state->entry_count; i++) {
    struct state_entry *entry = &state->entries[i];
    if (entry->status != ENTRY_ALIVE || entry->pid == self) continue;
    uint64_t start = started(entry->pid);
    if (start == entry->started || start == UNKNOWN) continue;
    entry->status = ENTRY_GONE;
    entry->used_bytes = 0;
  }
}

static uint64_t used(const struct state *state, uint32_t card) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < state->entry_count; i++)
    if (state->entries[i].card == card && state->entries[i].status == ENTRY_ALIVE) sum += state->entries[i].used_bytes;
  return sum;
}

// A place for a new entry: one never used, else that of a process that is gone.
static struct state_entry *vacant(struct state *state) {
  if (state->entry_count < MAX_ENTRIES) return &state->entries[state->entry_count++];
  for (uint32_t i = 0; i < MAX_ENTRIES; i++)
    if (state->entries[i].status != ENTRY_ALIVE) return &state->entries[i];
  return NULL;
}

int state_join(struct state *state, uint32_t card, struct state_entry **entry) {
  int64_t pid = getpid();
  uint64_t start = started(pid), outside = state->cards[card].outside_bytes;
  lock(state);
  reap(state);
  // An entry of this very process is from before an exec, which leaves process id and start time as they were.
  for (uint32_t i = 0; i < state->entry_count; i++)
    if (state->entries[i].pid == pid && state->entries[i].card == card && state->entries[i].status == ENTRY_ALIVE) {
      state->entries[i].status = ENTRY_GONE;
      state->entries[i].used_bytes = 0;
    }
  struct state_entry *place = vacant(state);
  int fits = place && used(state, card) + outside <= state->cards[card].total_bytes;
  if (place) {
    // A context that does not fit leaves an entry too: that a process was refused is worth telling.
    uint32_t status = fits ? ENTRY_ALIVE : ENTRY_GONE;
    *place = (struct state_entry){.pid = pid, .started = start, .card = card, .status = status};
    place->used_bytes = place->peak_bytes = fits ? outside : 0;
    place->refused = !fits;
  }
  unlock(state);
  *entry = fits ? place : NULL;
  return fits;
}

int state_take(struct state *state, struct state_entry *entry, uint64_t bytes) {
  lock(state);
  reap(state);
  int64_t first = state->fail_allocation, number = ++state->allocations;
  int told_to_fail = first && number >= first && number < first + state->fail_count;
  uint64_t total = state->cards[entry->card].total_bytes, taken = used(state, entry->card);
  int fits = !told_to_fail && taken <= total && bytes <= total - taken;
  if (fits) {
    entry->used_bytes += bytes;
    if (entry->used_bytes > entry->peak_bytes) entry->peak_bytes = entry->used_bytes;
  } else {
    entry->refused++;
  }
  unlock(state);
  return fits;
}

void state_give(struct state *state, struct state_entry *entry, uint64_t bytes) {
  lock(state);
  entry->used_bytes -= bytes <= entry->used_bytes ? bytes : entry->used_bytes;
  unlock(state);
}

uint64_t state_used(struct state *state, uint32_t card) {
  lock(state);
  reap(state);
  uint64_t sum = used(state, card);
  unlock(state);
  return sum;
}

unsigned state_processes(struct state *state, uint32_t card, struct state_entry *out, unsigned room) {
  unsigned count = 0;
  lock(state);
  reap(state);
  for (uint32_t i = 0; i < state->entry_count; i++) {
    const struct state_entry *entry = &state->entries[i];
    if (entry->card != card || entry->status != ENTRY_ALIVE) continue;
    if (count < room) out[count] = *entry;
    count++;
  }
  unlock(state);
  return count;
}
