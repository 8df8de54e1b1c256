/* Xen ELF notes (xen/include/public/elfnote.h) for the assembler. */
#define NOTE(type, directive, value) \
    .pushsection .note.Xen, "a", @note; \
    .balign 4; \
    .long 2f - 1f, 4f - 3f, type; \
1:  .asciz "Xen"; \
2:  .balign 4; \
3:  directive value; \
4:  .balign 4; \
    .popsection

#define NOTE_ENTRY 1
#define NOTE_HYPERCALL_PAGE 2
#define NOTE_VIRT_BASE 3
#define NOTE_PADDR_OFFSET 4
#define NOTE_XEN_VERSION 5
#define NOTE_GUEST_OS 6
#define NOTE_LOADER 8
#define NOTE_FEATURES 10
#define NOTE_PHYS32_ENTRY 18
