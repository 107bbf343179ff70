// Host memory that CUDA knows of: a table sorted by address, because PyTorch asks about pointers into the middle.
#include "host.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "card.h"

struct piece {
  uintptr_t address;
  size_t bytes;
  enum host_kind kind;
};
static struct piece *pieces;
static size_t count, room;

// How many pieces begin at or below `address`. With the tables locked.
static size_t upto(uintptr_t address) {
  size_t low = 0, high = count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (pieces[middle].address <= address) low = middle + 1;
    else high = middle;
  }
  return low;
}

static int insert(uintptr_t address, size_t bytes, enum host_kind kind) {
  size_t at = upto(address);
  if (at && pieces[at - 1].address + pieces[at - 1].bytes > address) return 0;
  if (count == room) {
    size_t wanted = room ? 2 * room : 64;
    struct piece *larger = realloc(pieces, wanted * sizeof *larger);
    if (!larger) return 0;
    pieces = larger;
    room = wanted;
  }
  memmove(pieces + at + 1, pieces + at, (count - at) * sizeof *pieces);
  pieces[at] = (struct piece){address, bytes, kind};
  count++;
  return 1;
}

int host_remember(void *address, size_t bytes, enum host_kind kind) {
  tables_lock();
  int done = insert((uintptr_t)address, bytes ? bytes : 1, kind);
  tables_unlock();
  return done;
}

// Pages that are never touched cost nothing, so a mapping and not malloc.
void *host_take(size_t bytes, enum host_kind kind) {
  if (!bytes) bytes = 1;
  void *address =
      mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) return NULL;
  if (host_remember(address, bytes, kind)) return address;
  munmap(address, bytes);
  return NULL;
}

int host_release(void *address, enum host_kind kind) {
  tables_lock();
  size_t at = upto((uintptr_t)address);
  struct piece found = at ? pieces[at - 1] : (struct piece){0};
  int known = found.address == (uintptr_t)address && found.kind == kind;
  if (known) memmove(pieces + at - 1, pieces + at, (count-- - at) * sizeof *pieces);
  tables_unlock();
  if (known && kind != HOST_REGISTERED) munmap(address, found.bytes);
  return known;
}

enum host_kind host_kind(const void *address) {
  tables_lock();
  size_t at = upto((uintptr_t)address);
  int inside = at && (uintptr_t)address < pieces[at - 1].address + pieces[at - 1].bytes;
  enum host_kind kind = inside ? pieces[at - 1].kind : HOST_UNKNOWN;
  tables_unlock();
  return kind;
}
