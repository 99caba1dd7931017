from abreast.command import main

main()
