// The address range that stands for all device memory of this process.
#include "memory.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "card.h"

#define USUAL_RANGE ((size_t)1 << 44)

// What each granule is: to whom it belongs, and whether pages back it.
enum { FREE = 0, EMPTY = 127, OWNER = 127, BACKED = 128 };  // 1 + device between FREE and EMPTY

static char *base;
static size_t granules;
static uint8_t *what;      // per granule, as above
static uint32_t *lengths;  // at the first granule of a run: how many it has
static uint64_t *notes;    // at the first granule of a run or of a mapping: its owner's
static size_t cursor;      // the next run ends at or below this granule
static char *symbols;      // the one granule of the __device__ variables

static void *reserve(size_t bytes, int protection) {
  void *place = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return place == MAP_FAILED ? NULL : place;
}

// All that the visible cards can hold. Expandable segments reserve ranges ahead and need more.
static size_t least(void) {
  size_t sum = 0;
  for (int i = 0; i < visible_cards(); i++) sum += card_of(i)->total_bytes;
  return sum + 2 * GRANULE;
}

static cudaError_t no_room(size_t wanted) {
  struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
  char why[128] = "this process has no limit (ulimit -v): the system itself refuses, as with vm.overcommit_memory=2";
  getrlimit(RLIMIT_AS, &limit);
  if (limit.rlim_cur != RLIM_INFINITY)
    snprintf(why, sizeof why, "the limit of this process is %llu GiB (ulimit -v), raise it",
             (unsigned long long)limit.rlim_cur >> 30);
  fprintf(stderr,
          "autobatch: the virtual GPU needs %zu GiB of address space (not of memory) and cannot have it; %s\n",
          (wanted + ((size_t)1 << 30) - 1) >> 30, why);
  // Not an out-of-memory: a smaller batch would not help.
  return cudaErrorOperatingSystem;
}

static int reserve_range(size_t bytes) {
  size_t count = bytes / GRANULE;
  char *range = reserve(bytes, PROT_NONE);
  what = reserve(count, PROT_READ | PROT_WRITE);
  lengths = reserve(count * sizeof *lengths, PROT_READ | PROT_WRITE);
  notes = reserve(count * sizeof *notes, PROT_READ | PROT_WRITE);
  if (range && what && lengths && notes) {
    madvise(range, bytes, MADV_DONTDUMP);
    base = (char *)(((uintptr_t)range + GRANULE - 1) / GRANULE * GRANULE);
    cursor = granules = count - 1;
    return 1;
  }
  if (range) munmap(range, bytes);
  if (what) munmap(what, count);
  if (lengths) munmap(lengths, count * sizeof *lengths);
  if (notes) munmap(notes, count * sizeof *notes);
  return 0;
}

// 16 TiB where that can be had, less under an address-space limit: addresses are then used again sooner.
cudaError_t memory_reserve(void) {
  size_t enough = least(), bytes = USUAL_RANGE;
  if (base) return cudaSuccess;
  for (; bytes > enough; bytes /= 2)
    if (reserve_range(bytes)) return cudaSuccess;
  return reserve_range(enough) ? cudaSuccess : no_room(enough);
}

int memory_ours(const void *address) {
  return base && (const char *)address >= base && (const char *)address < base + granules * GRANULE;
}

static size_t index_of(const void *address) { return (size_t)((const char *)address - base) / GRANULE; }
static size_t count_of(size_t bytes) { return (bytes + GRANULE - 1) / GRANULE; }
static int owner(size_t granule) { return what[granule] & OWNER; }

int memory_device(const void *address) {
  int found = memory_ours(address) ? owner(index_of(address)) : FREE;
  return found == FREE || found == EMPTY ? -1 : found - 1;
}

// The highest free run of `count` granules that ends at or below `end`; -1 if there is none.
static ptrdiff_t hole(size_t end, size_t count) {
  size_t run = 0;
  for (size_t i = end; i-- > 0;) {
    run = owner(i) == FREE ? run + 1 : 0;
    if (run == count) return (ptrdiff_t)i;
  }
  return -1;
}

// Addresses fall, as drivers hand them out: PyTorch's allocator breaks ties by address. At the lower end it begins
// again at the top, in what has become free.
static void *place(int as, size_t bytes) {
  size_t count = count_of(bytes ? bytes : 1);
  tables_lock();
  ptrdiff_t first = hole(cursor, count);
  if (first < 0) first = hole(granules, count);
  if (first >= 0) {
    for (size_t i = 0; i < count; i++) what[first + (ptrdiff_t)i] = (uint8_t)as;
    lengths[first] = (uint32_t)count;
    cursor = (size_t)first;
  }
  tables_unlock();
  if (first >= 0) return base + (size_t)first * GRANULE;
  no_room(bytes);
  return NULL;
}

void *memory_place(int device, size_t bytes) { return place(1 + device, bytes); }
void *memory_place_empty(size_t bytes) { return place(EMPTY, bytes); }

// Puts granules back to how they began: unbacked, so that the host has its pages again. With the tables locked.
static void unback(size_t first, size_t count) {
  int any = 0;
  for (size_t i = first; i < first + count; i++) any |= what[i] & BACKED;
  if (!any) return;
  char *from = base + first * GRANULE;
  madvise(from, count * GRANULE, MADV_DONTNEED);
  mprotect(from, count * GRANULE, PROT_NONE);
  for (size_t i = first; i < first + count; i++) what[i] &= OWNER;
}

void memory_assign(void *address, size_t bytes, int device) {
  tables_lock();
  size_t first = index_of(address), count = count_of(bytes);
  unback(first, count);
  for (size_t i = first; i < first + count && i < granules; i++) what[i] = (uint8_t)(device < 0 ? EMPTY : 1 + device);
  tables_unlock();
}

size_t memory_vacate(void *address) {
  if (!memory_ours(address) || ((char *)address - base) % GRANULE) return 0;
  tables_lock();
  size_t first = index_of(address), count = lengths[first];
  if (count) {
    unback(first, count);
    for (size_t i = first; i < first + count; i++) what[i] = FREE;
    lengths[first] = 0;
    notes[first] = 0;
  }
  tables_unlock();
  return count * GRANULE;
}

uint64_t memory_note(const void *address) { return memory_ours(address) ? notes[index_of(address)] : 0; }
void memory_set_note(void *address, uint64_t note) { notes[index_of(address)] = note; }

void *memory_run(const void *address, size_t *bytes) {
  if (!memory_ours(address)) return NULL;
  size_t first = index_of(address);
  while (first && !lengths[first]) first--;
  size_t count = lengths[first];
  if (first + count <= index_of(address)) return NULL;
  *bytes = count * GRANULE;
  return base + first * GRANULE;
}

cudaError_t memory_take(int device, size_t bytes, void **address) {
  cudaError_t error = context(device);
  if (error != cudaSuccess) return error;
  if (bytes > SIZE_MAX - GRANULE) return cudaErrorMemoryAllocation;
  size_t whole = count_of(bytes) * GRANULE;
  if (!charge(device, whole)) return cudaErrorMemoryAllocation;
  *address = memory_place(device, whole);
  if (*address) return cudaSuccess;
  refund(device, whole);
  return cudaErrorOperatingSystem;
}

cudaError_t memory_give(void *address) {
  int device = memory_device(address);
  size_t bytes = memory_vacate(address);
  if (!bytes) return cudaErrorInvalidValue;
  refund(device, bytes);
  return cudaSuccess;
}

// Backs the granules under a small copy. One that belongs to nobody is left alone, and so is one that the kernel
// refuses (it allows some 65000 separate mappings): what goes there is dropped, as a large copy is.
static int back(const void *address, size_t bytes) {
  size_t first = index_of(address), end = index_of((const char *)address + bytes - 1) + 1;
  int whole = 1;
  tables_lock();
  for (size_t i = first; i < end; i++) {
    if (i >= granules || owner(i) == FREE || owner(i) == EMPTY) whole = 0;
    else if (what[i] & BACKED) continue;
    else if (mprotect(base + i * GRANULE, GRANULE, PROT_READ | PROT_WRITE)) whole = 0;
    else what[i] |= BACKED;
  }
  tables_unlock();
  return whole;
}

static int backed(const void *address, size_t bytes) {
  size_t end = index_of((const char *)address + bytes - 1) + 1;
  for (size_t i = index_of(address); i < end; i++)
    if (i >= granules || !(what[i] & BACKED)) return 0;
  return 1;
}

// Small copies are real. Large ones to the device are dropped and large ones from it give zeros.
void memory_copy(void *to, const void *from, size_t bytes) {
  if (!bytes) return;
  int to_ours = memory_ours(to), from_ours = memory_ours(from);
  if (!to_ours && !from_ours) {
    memmove(to, from, bytes);
  } else if (!to_ours) {
    if (bytes <= SMALL_COPY && backed(from, bytes)) memcpy(to, from, bytes);
    else memset(to, 0, bytes);
  } else if (bytes <= SMALL_COPY) {
    if (from_ours && !backed(from, bytes)) memory_set(to, 0, bytes);
    else if (back(to, bytes)) memmove(to, from, bytes);
  }
}

void memory_copy_2d(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height) {
  if (width == to_pitch && width == from_pitch) {
    memory_copy(to, from, width * height);
    return;
  }
  // Rows of one large copy are as large as the whole: to the device they are dropped together.
  if (width * height > SMALL_COPY && memory_ours(to)) return;
  for (size_t row = 0; row < height; row++)
    memory_copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
}

// What was never written reads as zeros, so zeros need pages only where there are some already.
static void set_small(char *to, int value, size_t bytes) {
  while (bytes) {
    size_t rest = GRANULE - (size_t)(to - base) % GRANULE, part = bytes < rest ? bytes : rest;
    if (value & 255 ? back(to, part) : backed(to, part)) memset(to, value, part);
    to += part;
    bytes -= part;
  }
}

// A large one gives backed granules inside it back to the host, which makes them zeros; other values are dropped.
static void set_large(const char *to, size_t bytes) {
  tables_lock();
  size_t end = index_of(to + bytes);
  for (size_t i = index_of(to + GRANULE - 1); i < end && i < granules; i++)
    if (what[i] & BACKED) madvise(base + i * GRANULE, GRANULE, MADV_DONTNEED);
  tables_unlock();
}

void memory_set(void *to, int value, size_t bytes) {
  if (!memory_ours(to)) memset(to, value, bytes);
  else if (bytes <= SMALL_COPY) set_small(to, value, bytes);
  else if (!(value & 255)) set_large(to, bytes);
}

void memory_wipe(const void *address) {
  if (!memory_ours(address) || !(what[index_of(address)] & BACKED)) return;
  tables_lock();
  if (what[index_of(address)] & BACKED) memset((void *)address, 0, 512 - (uintptr_t)address % 512);
  tables_unlock();
}

void *memory_symbol(void) {
  if (!symbols) symbols = memory_place(current_device(), GRANULE);
  return symbols;
}
