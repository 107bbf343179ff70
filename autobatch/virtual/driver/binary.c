// Fat binaries: for which architectures each kernel was compiled, and which of them a card would load.
//
// CUB looks up how to launch by the architecture of the code that was loaded, which is seldom the card's own: a card
// of capability 8.9 runs what was compiled for 8.6, and to be told 8.9 is an error there.
#define _GNU_SOURCE
#include "binary.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "card.h"

#define WRAPPER_MAGIC 0x466243b1u  // NVIDIA's fatbinary_section.h
#define HEADER_MAGIC 0xba55ed50u
#define KIND_MACHINE_CODE 2
#define MAX_ARCHITECTURES 32

struct wrapper {
  uint32_t magic, version;
  const uint8_t *data;
  void *file_name;
};
struct header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t data_bytes;
};
// One piece of code, machine code or PTX; `header_bytes` of this, then `data_bytes` of it. As read from the binaries
// of torch 2.11 to 2.14; what lies between is not needed.
struct entry {
  uint16_t kind, unused;
  uint32_t header_bytes;
  uint64_t data_bytes;
  uint32_t others[3];
  uint32_t architecture;  // 86 for 8.6
};

struct binary {
  void *unused[4];  // the caller may look at what a handle points to
  int count;
  uint16_t architectures[MAX_ARCHITECTURES];
};

struct kernel {
  const void *host;
  const struct binary *binary;
};

static struct kernel *kernels;  // open addressing; a power of two of them, at most half of them taken
static size_t room, taken;

static void read_architectures(const struct wrapper *wrapper, struct binary *binary) {
  const struct header *header = (const struct header *)wrapper->data;
  if (wrapper->magic != WRAPPER_MAGIC || !header || header->magic != HEADER_MAGIC) return;
  const uint8_t *next = wrapper->data + header->header_bytes, *end = next + header->data_bytes;
  while (next + sizeof(struct entry) <= end) {
    struct entry entry;
    memcpy(&entry, next, sizeof entry);
    if (binary->count == MAX_ARCHITECTURES) abort();  // torch 2.14 has twelve at most
    if (entry.kind == KIND_MACHINE_CODE) binary->architectures[binary->count++] = (uint16_t)entry.architecture;
    if (!entry.header_bytes) return;
    next += entry.header_bytes + entry.data_bytes;
  }
}

void **binary_register(const void *fat_binary) {
  struct binary *binary = calloc(1, sizeof *binary);  // never freed: kernels may be asked about until the end
  if (!binary) abort();
  read_architectures(fat_binary, binary);
  return binary->unused;
}

static struct kernel *place_of(struct kernel *table, size_t size, const void *host) {
  size_t at = ((uintptr_t)host >> 4) * 0x9e3779b97f4a7c15u;
  while (table[at & (size - 1)].host && table[at & (size - 1)].host != host) at++;
  return &table[at & (size - 1)];
}

static void grow(void) {
  size_t size = room ? 2 * room : 1 << 16;
  struct kernel *larger = calloc(size, sizeof *larger);
  if (!larger) abort();
  for (size_t i = 0; i < room; i++)
    if (kernels[i].host) *place_of(larger, size, kernels[i].host) = kernels[i];
  free(kernels);
  kernels = larger;
  room = size;
}

void binary_register_kernel(void **handle, const void *host) {
  tables_lock();
  if (2 * (taken + 1) > room) grow();
  struct kernel *place = place_of(kernels, room, host);
  taken += !place->host;
  *place = (struct kernel){host, (const struct binary *)handle};
  tables_unlock();
}

int binary_architecture(const void *host, int capability) {
  tables_lock();
  const struct binary *binary = room ? place_of(kernels, room, host)->binary : NULL;
  tables_unlock();
  int own = 0, below = 0, lowest = 0;
  for (int i = 0; binary && i < binary->count; i++) {
    int architecture = binary->architectures[i];
    if (architecture <= capability && architecture / 10 == capability / 10 && architecture > own) own = architecture;
    if (architecture <= capability && architecture > below) below = architecture;
    if (!lowest || architecture < lowest) lowest = architecture;
  }
  // A card of another major version would load none of it: there only memory's arithmetic is asked for.
  return own ? own : below ? below : lowest ? lowest : capability;
}
